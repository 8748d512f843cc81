"""Instance labels across blocks: the steps between detecting objects in blocks and painting them."""
