"""What an adapter is worth on instructions that no stage has seen."""
