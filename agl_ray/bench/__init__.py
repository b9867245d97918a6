"""Measurements, started by `agl-ray bench X`."""
