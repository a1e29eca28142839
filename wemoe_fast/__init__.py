"""WEMoE at close to the speed of a single model."""
