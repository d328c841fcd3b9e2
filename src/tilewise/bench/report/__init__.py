"""The project's one report style: values in `page`, drawings in `charts`, wording of numbers in `units`."""
