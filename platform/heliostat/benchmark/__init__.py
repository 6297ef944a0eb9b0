"""Side-by-side measurements of the platform and its peers, in one run on one machine."""
