"""Store-to-store jobs: planned from metadata, run block by block, resumable."""
