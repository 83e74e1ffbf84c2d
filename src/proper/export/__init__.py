"""Export of users and the backbone (PEFT folders, user archives), and of adapters in static and int8 form."""
