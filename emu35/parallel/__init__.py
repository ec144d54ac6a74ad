"""Ranks: process groups, seeds, the collectives emu35 itself calls, and the CPU shim."""
