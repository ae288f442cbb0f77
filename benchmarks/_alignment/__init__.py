"""The state-alignment benchmark: streams, optimizers, interventions, measures, questions."""
