package dev.kd_dist.student;

/** What the student's output says. Plain Java 8, without Android; safe to call from any thread. */
public final class Postprocess {
    private Postprocess() {}

    /** The student's logits to the probability of each of StudentInfo.CLASS_NAMES: their softmax. */
    public static float[] probabilities(float[] logits) {
        double largest = Double.NEGATIVE_INFINITY;
        for (float logit : logits) {
            largest = Math.max(largest, logit);
        }
        double sum = 0;
        double[] shares = new double[logits.length];
        for (int i = 0; i < logits.length; i++) {
            shares[i] = Math.exp(logits[i] - largest);
            sum += shares[i];
        }
        float[] probabilities = new float[logits.length];
        for (int i = 0; i < logits.length; i++) {
            probabilities[i] = (float) (shares[i] / sum);
        }
        return probabilities;
    }

    /** The index of the largest value, the first of equal ones. */
    public static int best(float[] values) {
        int best = 0;
        for (int i = 1; i < values.length; i++) {
            if (values[i] > values[best]) {
                best = i;
            }
        }
        return best;
    }
}
