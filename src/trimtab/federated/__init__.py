"""Federated training rules, robust aggregation, calibration, fairness and privacy audits."""
