"""Loss, optimizers, schedules and the one trainer."""
