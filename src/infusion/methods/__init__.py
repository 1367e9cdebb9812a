"""Methods that Infusion is compared with; one file each, readable alone."""
