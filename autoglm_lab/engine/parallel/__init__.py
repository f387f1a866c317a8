"""One model over several processes, each with a device: rank 0 answers, the others follow its steps."""
