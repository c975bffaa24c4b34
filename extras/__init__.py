"""Optional tools, which a first reader can skip: tasks, plots, benchmark, study, report, embedded corpus."""
