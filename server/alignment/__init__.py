"""Alignment of the merged adapter on MediFlow-schema instructions: SFT, then DPO."""
