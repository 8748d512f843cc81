"""Operators: parameters, halo, memory and a call on one block."""
