"""What a judgement looks like to people: report.html and the model card."""
