"""Writers of this repository's own pages, from the records in results/; not part of the package."""
