"""Ranks: process groups and seeds (``mesh``), the collectives emu35 itself calls, what a device can
do at best (``device``), and the CPU shim."""
