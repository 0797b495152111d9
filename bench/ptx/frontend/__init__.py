"""PTX text into a program that the machine runs."""
