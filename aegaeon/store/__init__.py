"""The table of instances and the mailboxes between processes: one contract, three stores."""
