"""The mathematics of DHEN for one device (paper section 2)."""
