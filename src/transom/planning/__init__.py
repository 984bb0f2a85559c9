"""Arithmetic about models: functions of the arguments alone, no torch."""
