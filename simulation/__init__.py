"""Many hospitals on one machine: calls client and server, adds no second path."""
