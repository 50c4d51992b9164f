"""What training costs on a machine: operations, memory, hours, counted or measured here; and what makes it fit."""
