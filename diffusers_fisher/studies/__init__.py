"""Studies of the paper's other claims: transport maps, and Levenberg-Marquardt-Langevin sampling."""
