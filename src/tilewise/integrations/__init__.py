"""tilewise under other libraries' own attention calls: one line to register, one to take back."""
