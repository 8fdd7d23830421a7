"""A plan: models x checkpoints x guidance x data sets x metrics as one job (kind: plan)."""
