"""When blocks go and how many: schedule, vote, decision. Pure functions of plain values; nothing here sees a model."""
