"""What was measured: the store, figures computed from its rows, tables, plots and pages. No torch here."""
