"""What a first reader can skip: benchmark tasks, plots, costs, the study, the embedded corpus."""
