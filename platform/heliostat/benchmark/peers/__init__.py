"""The servers that Heliostat is measured beside, as a user of each would write them."""
