"""What tests share: small models, rank servers, forked runs, oracles."""
