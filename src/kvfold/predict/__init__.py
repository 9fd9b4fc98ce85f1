"""What a conversion saves and costs, from config.json alone: plan, roofline, engines."""
