"""One file per device behind one seam of eight verbs."""
