"""Array code of one block: eager, pure, on NumPy or CuPy."""
