"""How rows are laid out in files of people and public sets, and what each layout becomes."""
