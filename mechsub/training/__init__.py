"""Training, whatever the family: settings, checkpoint schedule, callbacks, optimizers."""
