"""Detection of objects, surface anomalies, and manipulated or generated images."""
