"""The genetic search for a rank of every matrix: genome, operators, fitness, study, workers."""
