"""Jobs as a user sees them: what is uploaded, what was asked for, what each waits for."""
