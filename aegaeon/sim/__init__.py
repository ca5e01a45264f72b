"""Loads on devices that are not there: the schedulers' decisions under a virtual clock."""
