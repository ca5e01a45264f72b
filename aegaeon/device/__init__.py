"""One file per device behind one seam: the operators of a step, and few verbs around it."""
