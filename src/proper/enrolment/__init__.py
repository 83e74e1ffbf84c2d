"""Enrolment after training: fits one new user, or one with new interactions, from the fit queue or the command line."""
