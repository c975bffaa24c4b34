"""What a first reader can skip: loading weights, routing measures, generated text, tasks, costs, the study."""
