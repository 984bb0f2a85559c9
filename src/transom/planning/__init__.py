"""The size and cost of models: functions of the arguments alone, no torch."""
