"""Families of models: each a folder with its settings, model, trait, carrier, losses and training."""
