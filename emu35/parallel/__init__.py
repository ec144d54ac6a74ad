"""Ranks: process groups and seeds (``mesh``), the collectives emu35 itself calls, what a device can
do at best (``device``), random numbers that all of them draw alike (``noise``), the CPU shim."""
