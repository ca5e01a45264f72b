"""Who owns which bytes: weights and KV, inside their budgets."""
