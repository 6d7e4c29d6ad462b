"""What depends on the machine: its arithmetic, its memory, its clock."""
