"""Delivering: chunks out of the buffer, batches to PostHog, verdicts back."""
