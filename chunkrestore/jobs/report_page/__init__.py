"""Parts of the page that shows a job: what its events add up to, figures, slices, tables, and the page itself."""
