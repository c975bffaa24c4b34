"""What goes beyond the reference: other layouts of weights, benchmark tasks, the cost of routing, the study."""
